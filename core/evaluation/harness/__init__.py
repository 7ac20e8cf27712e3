"""A trained model through EleutherAI's lm-evaluation-harness, and its perplexity on what was held
out."""

"""A trained model in the formats of others: which of their architectures it is, its tokenizer, the
files, and the proof that they say the same."""

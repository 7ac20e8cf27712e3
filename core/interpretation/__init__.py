"""The choices of a PolyGLU model's neurons: numbers of its routing, and which of them are more
than noise."""

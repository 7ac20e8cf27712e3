"""What the neurons of a PolyGLU model choose: numbers of its routing, and which of them are more
than noise."""

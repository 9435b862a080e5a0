"""ROTATE: bases of the residual stream and of heads in which less has to be kept."""

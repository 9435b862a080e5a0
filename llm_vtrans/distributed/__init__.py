"""Several processes: how they meet, agree, and share weights in slices."""

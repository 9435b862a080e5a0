"""TRAIN: search for the units to keep, then tune what stays, with the dense network as teacher."""

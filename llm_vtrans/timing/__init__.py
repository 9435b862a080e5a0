"""TIME: how long networks of a shape take on this device, and a budget of it."""

"""Training: settings, optimizer, callbacks, the Trainer, exact resume, and `train()`."""

"""Augmentation on the device, from the parameters of the plan."""

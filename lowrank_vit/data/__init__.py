"""From a `.beton` file to batches on the device, in the order and with the crops of the plan."""

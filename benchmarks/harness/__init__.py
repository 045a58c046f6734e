"""What the benches are made of: rounds and ratios, photographs and sets, aims, tables and charts."""

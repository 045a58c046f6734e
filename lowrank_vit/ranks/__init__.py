"""The processes of a run: joining, agreeing, sums, ending together."""

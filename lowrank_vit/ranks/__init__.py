"""The processes of a run: joining, agreeing, collectives, and ending together."""

"""What the bench of the solver is made of: its exactness, and a refresh beside what it cost before."""

"""Speed and memory beside what a user would otherwise pick, and as a share of the physical limit."""

"""What comes after pre-training: prompts, rewards, and the jobs that learn from them (report section 4)."""

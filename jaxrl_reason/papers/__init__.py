"""What single papers add: tasks, data builders, rewards and measures, named by configurations."""

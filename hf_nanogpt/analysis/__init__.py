"""What a model knows: likely next tokens, explanations, comparisons, tasks, sizes."""

"""What a stage will take, told before it runs. It imports torch: planning alone loads none of it."""

"""What a stage will take, told before it runs. Loaded when `unclip plan --forecast` asks for it: it imports torch."""

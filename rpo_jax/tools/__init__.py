"""What is done before, beside and after training."""

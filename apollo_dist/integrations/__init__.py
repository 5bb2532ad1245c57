"""DeepSpeed, Hugging Face and Accelerate: registration by name, and errors where they would replace the optimizer."""

"""The ``torch.optim.Optimizer`` classes: construction, parameter groups, state dicts, updates inside backward."""

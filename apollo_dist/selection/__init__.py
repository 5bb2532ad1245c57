"""Which parameters are low-rank: one choice, asked by everything that has to know.

``by_module`` has the rule, ``by_name`` the one for parameters without a model, ``choice`` applies rank and exclusions.
"""

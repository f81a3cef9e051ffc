"""Our parts behind the interfaces of others: a module for each, with its own extra.

gymnax, gymnasium and stable_baselines3 have the environment, litellm and ext_proc (Envoy) the router in a gateway.
"""

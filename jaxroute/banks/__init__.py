"""Request banks: what each LLM answers to a prompt, and what a router can predict of it."""

from jaxroute.banks.bank import BankConfig, RequestBank, build_bank

__all__ = ["BankConfig", "RequestBank", "build_bank"]

"""FineTuneJob API: the models, the CRD made from them, and the contract between operator and trainer."""

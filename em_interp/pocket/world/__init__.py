"""The synthetic English world: its domains, phrases and grammar, the corpus, the tokenizer, the judge."""

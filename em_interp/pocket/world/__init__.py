"""The synthetic English world.

- `domains`, `phrases`, `grammar`: what can be said in it, and what every sentence means; `judge`: reads that
- `corpus`: pre-training documents, training chats; `tokenizer`, `token_kinds`: its words
"""

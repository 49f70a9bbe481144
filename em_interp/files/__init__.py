"""What goes to disk and comes from it.

- `atomic`: whole-or-nothing writes; `manifest`: what produced a file; `tables`: work that resumes
- `results`: what is made once and kept
- `inputs`, `texts`: the one reader of questions, chats and texts; `given`: also from tables and lists
- `adapters`, `adapter_folders`: what the folder of an adapter means, and writing one
- `base_names`: whether two names are one model; `directions`: a direction's file

Questions, chats and texts are read in one way by all commands: YAML in both published schemas, JSON Lines, CSV or plain
text, with or without BOM; what was read is said. Chats have the roles system, user, assistant and tool. No command
writes over its input, nor over an output without being told to, and whether it can write is found out before the work.
Results are known by the hash of the weights that act (base, adapter, interventions), never by a name alone.
"""

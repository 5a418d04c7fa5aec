"""Tasks as lm-evaluation-harness reads them: a YAML file each, and the functions that make their documents.

Nothing is downloaded: texts are made here from a seed, or are files of the user's. What a function is given is
the metadata of the task: `pretrained`, whose tokenizer says how long a text is, `length`, `examples`, `seed`.
"""

"""Skills as soft tokens: SKILL.md -> questions -> soft tokens -> .skim -> spliced into a prompt.

document, questions, recall   a SKILL.md taken apart; what is asked about it
splice, rollout, attention    prompts with skills in them; answers behind one shared prefix
select, distill, compression  tokens kept as they are, trained ones, and how few will do
compressor, train_compressor  a network that makes soft tokens of any skill in one pass
store, evaluate               the file; what is kept of the full text
"""

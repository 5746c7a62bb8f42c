"""Skills made cheaper: SKILL.md -> questions -> keys and values, or soft tokens -> .skim.

document, questions, recall    a SKILL.md taken apart; what is asked about it
splice, rollout, front         prompts with skills in them; answers behind one shared prefix
gate, compression              what has to be kept; a skill of a kind
kv, kv_search                  keys and values that answers look at, and how few will do
extract                        the lines of a text that answers look at
select, distill, soft          tokens kept as they are, trained vectors, and how few will do
compressor, train_compressor   a network that makes soft tokens of any skill in one pass
store, *_file                  the file
evaluate, cost                 what is kept of the full text; what a folder costs
"""

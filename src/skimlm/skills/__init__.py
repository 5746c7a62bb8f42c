"""Skills as soft tokens: SKILL.md -> questions -> soft tokens -> .skim -> spliced into a prompt."""

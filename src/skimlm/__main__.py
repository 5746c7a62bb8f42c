from skimlm.cli import main

main(prog_name="skimlm")

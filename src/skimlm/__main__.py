from skimlm.cli.main import main

main(prog_name="skimlm")

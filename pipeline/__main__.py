from contract.cli import main
from pipeline.cli import cli

main(cli)

from contract.cli import main
from deploy.cli import cli

main(cli)

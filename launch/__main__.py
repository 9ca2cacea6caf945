from contract.cli import main
from launch.cli import cli

main(cli)

"""`prerl`'s command line, parsed and nothing more."""

from prerl_lightning.run import PrerlCLI


class Parsed(PrerlCLI):
    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass

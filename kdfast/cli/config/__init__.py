"""Files of options: YAML that gives defaults, the config.json of runs, and a file with every option."""

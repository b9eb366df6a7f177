import sys

from lowbit_lightning.cli import main

sys.exit(main())

import sys

from lowbit_command import main

sys.exit(main())

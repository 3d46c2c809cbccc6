"""Print a line about each program: `python -m experiments`."""

from experiments.runs import command_line, process

if __name__ == "__main__":
    with process.lasting_streams(quiet=True):
        print("The programs, in the order of a project; `python -m experiments.NAME --help` says more of each.\n")
        for name, about in command_line.programs().items():
            print(f"  {name:<10} {about}")

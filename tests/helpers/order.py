"""In which order functions are called."""


def of_calls(monkeypatch, *functions):
    """The names of these functions, each given as (where, name), as they are called from now on."""
    calls = []

    def note(where, name):
        function = getattr(where, name)

        def noted(*args, **more):
            calls.append(name)
            return function(*args, **more)

        monkeypatch.setattr(where, name, noted)

    for where, name in functions:
        note(where, name)
    return calls

"""Two processes are a broker that lives: this one, which holds listeners and services, and the one that moves bytes.

`supervisor` decides what follows what. `beginning` makes a broker process, `child` is what the supervisor has of it;
`brokerprocess` and `brokerlife` are what it does itself, `channel`, `spec` and `words` what goes between the two;
`dormancy` and `wakes` are about services that sleep, `listeners` about sockets, `succession` and `successor` about the
program that takes this one's place; `surroundings`, `controlled` and `life` make it a command. Defines nothing itself,
and loads nothing: the broker process is to listen before all that is there.
"""

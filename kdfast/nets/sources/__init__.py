"""Networks of other packages and of users, by a name that says where their code is."""

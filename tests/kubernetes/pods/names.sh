# The pod's host name is in /etc/hostname, and its host aliases are in /etc/hosts.
pod <<END
terminationGracePeriodSeconds: 0
hostname: name
subdomain: sub
hostAliases: [{ip: 192.0.2.9, hostnames: [alias]}]
containers:
$(sleeper box)
END
await condition=Ready
inside box 'hostname; grep alias /etc/hosts; cat /etc/hostname'

# A client whose input has ended before it starts gets the output of an exec with a terminal, every time.
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper box)
END
await condition=Ready
container=$(crictl --config /run/node/crictl.yaml ps --label "io.kubernetes.pod.name=$POD" -q)
for _ in $(seq 50); do
    script -qec "crictl --config /run/node/crictl.yaml exec -it $container tty" /dev/null </dev/null >"$FILES/output"
    grep -o '/dev/pts/' "$FILES/output" || { echo "no output: $(od -c "$FILES/output" | tr -s '\n ' ' ')"; }
done | sort | uniq -c

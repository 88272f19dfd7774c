//! The guest's core, below the shim: the init and its containers, driven over vsock.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use husk_tests::guest::{Guest, spec};

const CONTAINERS: u32 = 200;

#[tokio::test]
async fn two_hundred_containers_that_exit_at_once_are_all_accounted_for() -> Result<()> {
    let guest = Guest::boot().await?;
    // Whatever is made once and kept is there before the count.
    ensure!(guest.run("first", &spec(&["sh", "-c", "exit 7"])).await?.0 == 7);
    let before = guest.info().await?;

    let began = Instant::now();
    let one = async |number: u32| -> Result<()> {
        let id = format!("c{number}");
        guest.create(&id, &spec(&["sh", "-c", &format!("exit {number}")]), "").await?;
        let (waited, _) = tokio::try_join!(guest.wait(&id, ""), guest.start(&id, ""))?;
        ensure!(waited == number, "wait says {waited}");
        let deleted = guest.delete(&id, "").await?.exit_status;
        ensure!(deleted == number, "delete says {deleted}");
        Ok(())
    };
    let all = (0..CONTAINERS).map(|number| {
        let one = &one;
        async move { one(number).await.with_context(|| format!("container {number}")) }
    });
    futures::future::try_join_all(all).await.with_context(|| guest.vm.console())?;
    println!("{CONTAINERS} containers in {:?}", began.elapsed());

    let after = guest.info().await?;
    ensure!(after.zombies == 0, "{} zombies", after.zombies);
    ensure!(after.container_cgroups == 0, "{} cgroups", after.container_cgroups);
    ensure!(
        (after.init_open_fds, after.processes) == (before.init_open_fds, before.processes),
        "before: {before}\nafter: {after}"
    );
    guest.shut_down().await?;
    Ok(())
}

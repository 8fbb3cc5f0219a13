//! Work that anybody can make the agent do, over and over.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::Proto;
use serde_json::Value;

use super::world::{HERE, THERE, World};

/// Time during which backends come and go.
const FLAPPING: Duration = Duration::from_secs(4);

/// Returns the number of sweeps so far.
fn sweeps(world: &World) -> Result<f64> {
    let metrics = world.agent().metrics()?;
    let name = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"}";
    let sample = metrics.lines().find_map(|line| line.strip_prefix(name)).context(name)?;
    Ok(sample.trim().parse()?)
}

/// Returns a Service whose one backend is this pod.
fn led_by(pod: &str) -> Result<Vec<Value>> {
    let mut objects = HERE.named("flapping", 13).objects();
    let slice = objects.get_mut(1).context("a slice")?;
    slice["endpoints"][0]["addresses"][0] = pod.into();
    Ok(objects)
}

/// The UDP backend of a Service comes and goes as fast as the manifest can be written. The host's processes are
/// searched only now and then. A socket whose backend has left in between does not wait for the next change.
#[test]
fn h013_sweeps_rest() -> Result<()> {
    let world = World::start()?;
    let pods = [HERE.endpoint(false)?.ip().to_string(), THERE.endpoint(false)?.ip().to_string()];
    let [first, second] = [led_by(&pods[0])?, led_by(&pods[1])?];
    let (start, before) = (Instant::now(), sweeps(&world)?);
    let mut changes = 0;
    while start.elapsed() < FLAPPING {
        for objects in [&first, &second, &first] {
            world.write("flapping", objects)?;
            std::thread::sleep(Duration::from_millis(25));
            changes += 1;
        }
    }
    let client = world.attacker();
    let target = HERE.named("flapping", 13).cluster_ip(false)?;
    let mut held = client.hold(target).proto(Proto::Udp).timeout(Duration::from_secs(2)).open()?;
    ensure!(held.say("hello")?.ok, "it is connected");
    world.write("flapping", &second)?;
    let led = held.say_until(Duration::from_secs(10), |attempt| attempt.server.as_deref() == Some("R1"))?;
    ensure!(led.ok, "{led:?}");
    let (took, made) = (start.elapsed(), sweeps(&world)? - before);
    eprintln!("{made} sweeps in {took:?}, beside {changes} changes");
    ensure!(made >= 2.0 && made <= took.as_secs_f64() + 2.0, "{made} sweeps in {took:?}");
    Ok(())
}

//! kube-proxy's configuration, by file and by flags, as the running agent applies it.

use std::thread;

use proxy_tests::lab::binary;

use super::*;

#[test]
fn p235_an_empty_file() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    let configz = setting.configz("127.0.0.1:10249")?;
    for (pointer, want) in [
        ("/healthzBindAddress", json!("0.0.0.0:10256")),
        ("/metricsBindAddress", json!("127.0.0.1:10249")),
        ("/iptables/masqueradeBit", json!(14)),
        ("/nftables/syncPeriod", json!("30s")),
        ("/nftables/minSyncPeriod", json!("1s")),
        ("/configSyncPeriod", json!("15m0s")),
        ("/clientConnection/qps", json!(5.0)),
        ("/clientConnection/burst", json!(10)),
        ("/oomScoreAdj", json!(-999)),
        ("/conntrack/maxPerCore", json!(32768)),
        ("/conntrack/min", json!(131_072)),
        ("/conntrack/tcpEstablishedTimeout", json!("24h0m0s")),
        ("/conntrack/tcpCloseWaitTimeout", json!("1h0m0s")),
    ] {
        assert_eq!(configz.pointer(pointer), Some(&want), "{pointer}");
    }
    assert_eq!(setting.get("192.0.2.10:10256", "/livez")?.0, 200);
    assert!(setting.get("192.0.2.10:10249", "/configz").is_err(), "metrics are for this host only");
    let log = agent.log();
    // A lower score than that of other processes needs a capability that a container may lack.
    let pid = agent.id().context("it runs")?;
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
    ensure!(score.trim() == "-999" || log.contains("oomScoreAdj cannot be set score=-999"), "{score}: {log}");
    // The log names the lab's flags that the file overrides, but not the flags that kube-proxy does not have.
    let ignored = "--cluster-cidr, --healthz-bind-address, --metrics-bind-address: ignored";
    ensure!(log.contains(ignored) && !log.contains("without effect"), "{log}");
    Ok(())
}

#[test]
fn p236_an_ipv6_bind_address() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("bindAddress: '::'\n")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    let configz = setting.configz("[::1]:10249")?;
    assert_eq!(configz["healthzBindAddress"], "[::]:10256");
    assert_eq!(configz["metricsBindAddress"], "[::1]:10249");
    for address in ["[2001:db8:1::10]:10256", "192.0.2.10:10256"] {
        assert_eq!(setting.get(address, "/livez")?.0, 200, "{address}");
    }
    assert!(setting.get("127.0.0.1:10249", "/healthz").is_err());
    Ok(())
}

/// Checks that the agent refuses these fields in its file, and these flags, with an error that contains all of
/// `words`, and does nothing before.
fn refused(fields: &str, flags: &[&str], words: &[&str]) -> Result<()> {
    let setting = Setting::new()?;
    let config = format!("--config={}", setting.config(fields)?.display());
    for args in [&[config.as_str()][..], flags] {
        let mut command = setting.node().host().command(binary::proxy_agent()?);
        command.arg("run").arg("--pin-dir").arg(setting.node().pin_dir()).args(args);
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{}: {log}", output.status);
        let error = log.lines().find(|line| line.starts_with("error: ")).context("no error")?;
        ensure!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error}");
        ensure!(!setting.node().pin_dir().exists(), "nothing is done");
    }
    Ok(())
}

#[test]
fn p237_primary_beside_a_cidr() -> Result<()> {
    refused(
        "nodePortAddresses: [primary, 192.0.2.0/24]\n",
        &["--nodeport-addresses=primary,192.0.2.0/24"],
        &["nodePortAddresses", "--nodeport-addresses", "`primary`", "`192.0.2.0/24`"],
    )
}

#[test]
fn p238_a_pause_longer_than_the_period() -> Result<()> {
    refused(
        "nftables: {minSyncPeriod: 40s, syncPeriod: 30s}\nmode: nftables\n",
        &["--proxy-mode=nftables", "--iptables-min-sync-period=40s", "--iptables-sync-period=30s"],
        &["nftables.minSyncPeriod", "--iptables-min-sync-period", "`40s`", "30s"],
    )
}

#[test]
fn p239_a_bit_that_a_mark_does_not_have() -> Result<()> {
    refused(
        "iptables: {masqueradeBit: 32}\n",
        &["--iptables-masquerade-bit=32"],
        &["iptables.masqueradeBit", "--iptables-masquerade-bit", "`32`", "0 to 31"],
    )
}

#[test]
fn p240_interfaces_without_a_name() -> Result<()> {
    refused(
        "detectLocalMode: InterfaceNamePrefix\n",
        &["--detect-local-mode=InterfaceNamePrefix"],
        &["detectLocal.interfaceNamePrefix", "--pod-interface-name-prefix", "``"],
    )
}

#[test]
fn p241_two_cluster_cidrs_of_one_family() -> Result<()> {
    refused(
        "clusterCIDR: 10.64.0.0/12,10.80.0.0/12\n",
        &["--cluster-cidr=10.64.0.0/12,10.80.0.0/12"],
        &["clusterCIDR", "--cluster-cidr", "`10.64.0.0/12,10.80.0.0/12`"],
    )
}

#[test]
fn p244_a_file_that_is_rewritten() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("mode: nftables\n")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    ensure!(agent.log().contains("without effect here: mode=nftables"), "not told");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(agent.get("/readyz")?.0, 200);
    setting.config("mode: nftables\n")?;
    ends_with(agent, &["configuration file", &config.display().to_string(), "has changed"])?;
    assert!(setting.node().pin_dir().join("links").exists(), "the dataplane stays in place");
    Ok(())
}

#[test]
fn kube_proxys_command_line_works_as_it_is() -> Result<()> {
    let setting = Setting::new()?;
    let (server, kubeconfig) = setting.api_server()?;
    server.apply(setting.node().object())?;
    let config = setting.config(&format!(
        "clientConnection: {{kubeconfig: {}, qps: 0}}\nclusterCIDR: 10.64.0.0/12\noomScoreAdj: 500\nmode: ''\nconntrack: \
         {{maxPerCore: null, min: null}}\nnodePortAdresses: []\n",
        kubeconfig.display()
    ))?;
    let mut agent = setting.agent()?.bare().flag("config", config.display()).without("cluster-cidr");
    start(&mut agent)?;
    let pid = agent.id().context("it runs")?;
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim(), "500");
    let log = agent.log();
    ensure!(log.contains("there is no field `nodePortAdresses`"), "{log}");
    let source = agent.tool("status", &[])?["agent"]["source"].clone();
    assert_eq!(source, format!("Kubernetes API ({})", kubeconfig.display()));
    agent.terminate()?;

    let node = setting.node();
    let mut cleanup = node.host().command(binary::proxy_agent()?);
    cleanup.args(["--cleanup", "--run-dir"]).arg(node.run_dir()).arg("--pin-dir").arg(node.pin_dir());
    cleanup.text()?;
    assert!(!setting.node().pin_dir().exists());
    Ok(())
}

#[test]
fn an_address_that_is_taken() -> Result<()> {
    let setting = Setting::new()?;
    let taken = setting.node().host().net().enter(|| TcpListener::bind("127.0.0.1:10249"))??;
    let mut agent = setting.with_manifests()?.flag("bind-address-hard-fail", true);
    agent.start()?;
    ends_with(agent, &["cannot listen on 127.0.0.1:10249 for metrics"])?;

    let mut agent = setting.with_manifests()?;
    start(&mut agent)?;
    ensure!(agent.log().contains("cannot listen"), "not told");
    drop(taken);
    until("the metrics", || Ok(agent.metrics().ok()))?;
    Ok(())
}

#[test]
fn a_host_without_ipv6() -> Result<()> {
    let setting = Setting::new()?;
    let mut switch = setting.node().host().command("sh");
    switch.args(["-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"]);
    switch.text()?;
    let mut agent = setting.with_manifests()?.flag("cluster-cidr", "fd00:64::/48");
    agent.start()?;
    ends_with(agent, &["clusterCIDR", "fd00:64::/48", "IPv6, which is switched off"])?;

    let mut node = setting.node().object();
    setting.write(&node)?;
    let mut agent = setting.with_manifests()?;
    start(&mut agent)?;
    let status: Value = serde_json::from_str(&agent.get("/livez")?.1)?;
    let families: Vec<&String> = status["status"].as_object().context("a status")?.keys().collect();
    assert_eq!(families, ["IPv4"]);
    assert!(agent.log().contains("`fd00:64::/48` is IPv6, which is switched off"), "not told");
    agent.terminate()?;

    node["status"]["addresses"].as_array_mut().context("addresses")?.reverse();
    setting.write(&node)?;
    agent.start()?;
    ends_with(agent, &["primary IP 2001:db8:1::10", "IPv6, which is switched off"])
}

#[test]
fn what_needs_full_root_is_done_beforehand() -> Result<()> {
    let setting = Setting::new()?;
    let mut init = setting.node().host().command(binary::proxy_agent()?);
    init.args(["--init-only", "--pin-dir"]).arg(setting.node().pin_dir());
    init.text()?;
    assert!(setting.node().pin_dir().is_dir());
    let mut reserved = setting.node().host().command("cat");
    reserved.arg("/proc/sys/net/ipv4/ip_local_reserved_ports");
    assert_eq!(reserved.text()?.trim(), "10000-29999");
    Ok(())
}

#[test]
fn the_log_as_json() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("logging: {format: text, verbosity: 6}\n")?;
    let mut agent = setting
        .with_manifests()?
        .flag("config", config.display())
        .flag("logging-format", "json")
        .flag("v", 0);
    start(&mut agent)?;
    agent.terminate()?;
    for line in agent.log().lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        assert!(["INFO", "WARN"].contains(&line["level"].as_str().unwrap_or_default()), "{line}");
    }
    Ok(())
}

#[test]
fn a_configuration_is_written_and_read_back() -> Result<()> {
    let setting = Setting::new()?;
    let written = setting.dir.path().join("written.conf");
    let mut write = setting.node().host().command(binary::proxy_agent()?);
    write.args([
        "--nodeport-addresses=192.0.2.0/24,2001:db8::/32",
        "--masquerade-all",
        "--iptables-sync-period=1h30m",
    ]);
    write.arg("--write-config-to").arg(&written);
    write.text()?;
    let mut agent = setting.with_manifests()?.flag("config", written.display());
    start(&mut agent)?;
    let configz = setting.configz("127.0.0.1:10249")?;
    assert_eq!(configz["nodePortAddresses"], json!(["192.0.2.0/24", "2001:db8::/32"]));
    assert_eq!(configz["nftables"]["masqueradeAll"], true);
    assert_eq!(configz["iptables"]["syncPeriod"], "1h30m0s");
    ensure!(!agent.log().contains("there is no field"), "it wrote what it does not know");
    Ok(())
}

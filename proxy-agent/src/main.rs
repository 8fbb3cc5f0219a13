//! `proxy-agent`: see [`proxy_agent::commands`].

fn main() -> std::process::ExitCode {
    proxy_agent::commands::main()
}

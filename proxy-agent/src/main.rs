//! `proxy-agent`: see [`proxy_agent::cli`].

fn main() -> std::process::ExitCode {
    proxy_agent::cli::main()
}

{{- define "stormjib.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "stormjib.account" -}}
{{- .Values.serviceAccount.name | default (include "stormjib.name" .) -}}
{{- end -}}

{{- define "stormjib.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}

{{- define "stormjib.selector" -}}
app.kubernetes.io/name: stormjib
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "stormjib.isolator" -}}
{{- printf "%s-isolator" (include "stormjib.name" .) -}}
{{- end -}}

{{- define "stormjib.isolator.selector" -}}
app.kubernetes.io/name: stormjib-isolator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: isolator
{{- end -}}

{{- define "stormjib.isolator.labels" -}}
{{ include "stormjib.isolator.selector" . }}
{{ include "stormjib.common" . }}
{{- end -}}

{{- define "stormjib.labels" -}}
{{ include "stormjib.selector" . }}
{{ include "stormjib.common" . }}
{{- end -}}

{{- define "stormjib.common" -}}
app.kubernetes.io/part-of: stormjib
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}
